"""Images: opened, decoded, cropped, ordered and split."""
