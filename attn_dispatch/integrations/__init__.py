"""Other people's engines as clients. The only modules of the core that import torch; nothing in the core imports them."""
