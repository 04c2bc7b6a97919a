"""`penstock simulate`: what routing would do to a load, on virtual time."""
