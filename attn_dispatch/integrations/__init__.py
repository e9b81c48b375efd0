"""Other people's engines and compilers: the only modules that import torch. Nothing in the core imports them."""
