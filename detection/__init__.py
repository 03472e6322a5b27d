"""DETR: detection as set prediction, and its panoptic head."""
