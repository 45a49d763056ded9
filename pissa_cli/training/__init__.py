"""A step of training and all around it; the loop itself is `pissa_cli.train`."""
