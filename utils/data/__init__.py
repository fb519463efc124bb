"""Where batches come from: folders of images, or tokens made beforehand."""
