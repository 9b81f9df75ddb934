"""Linear models: AdaGrad-BMA with one block a unit where the loss is convex."""
