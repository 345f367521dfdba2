"""Images in and out, sheets of images, the watermark."""
