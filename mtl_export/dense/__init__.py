"""Dense tasks of one image: a Swin with task streams, from its file to graphs and a verdict."""
