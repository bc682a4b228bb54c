"""Reading images, and the transforms from images to the input of a vision tower."""
