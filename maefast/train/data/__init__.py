"""Reading, decoding, cropping, ordering and splitting of images."""
