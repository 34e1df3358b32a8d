"""From score files to tables, figures and the manifest."""
