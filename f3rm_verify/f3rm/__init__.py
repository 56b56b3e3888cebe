"""The nerfstudio method `f3rm`, and what runs inside a training process. Only this package imports nerfstudio."""
