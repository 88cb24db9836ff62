"""KptLLM core: the keypoint model and its process. Knows nothing of Label Studio; importing it loads no torch."""

import os

# Threads of torch that wait asleep. By default they spin, and on a machine with other work one pass then takes 50 times
# as long (measured on two cores). OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
