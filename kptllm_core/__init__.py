"""KptLLM core: the keypoint model and its process. Knows nothing of Label Studio; importing it loads no torch."""
