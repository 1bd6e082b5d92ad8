"""Views: what lets others open a checkpoint without a conversion."""
