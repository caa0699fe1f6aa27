"""What is done with a weight before and while it is rounded: rotation, smoothing, AWQ, GPTQ; their captured inputs."""
