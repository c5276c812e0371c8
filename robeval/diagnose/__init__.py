"""Signs of a weak evaluation: tests of the model, of its gradients, of each attack, and of attacks together."""
