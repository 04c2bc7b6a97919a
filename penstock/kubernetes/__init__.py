"""The Kubernetes API, as far as Penstock needs it: objects are plain JSON, and the server checks them."""
