"""Students: one training run per student and seed, and export as a diffusers pipeline."""
