"""Reading images, and the transforms from images to the input of a vision tower."""

from maple.data.images.reading import read_image as read_image
