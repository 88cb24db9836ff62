"""Labels of other tools, read from their own files: COCO keypoints, DeepLabCut, SLEAP, Ultralytics YOLO pose."""
