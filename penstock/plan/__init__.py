"""`penstock plan`: how many GPUs a load needs, and how to divide them."""
