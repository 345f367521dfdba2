"""Images that steer a run: control maps, masked images, context images, Redux images."""
