"""One operation a file: the plain reference of each piece of mathematics the model is made of."""
