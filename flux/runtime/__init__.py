"""Where and how models run: devices, memory, offloading, quantisation, several GPUs."""
