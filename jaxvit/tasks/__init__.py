"""What frozen features are good for: readouts that are fitted to them, and scores. Imports all other rooms of jaxvit.

`classify`: k nearest neighbours, logistic regression, nearest class mean. `dense`: linear segmentation. `match`:
correspondence, point in box, and LOST, which finds objects without labels. `score`: a number with its interval, and the
difference of two, image by image.

Fitting needs optax: pip install 'jaxvit[experiments]'.
"""
