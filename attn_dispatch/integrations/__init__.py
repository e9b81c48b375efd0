"""Other people's engines as clients: the only modules that import torch. Nothing in the core imports them."""
