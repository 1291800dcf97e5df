"""What others do to a model without retraining, on our sites: the baselines that every plan of ours must beat."""
