"""One train step and one loop for every stage, for pretraining and for personalisation."""
