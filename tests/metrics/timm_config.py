"""The `config.json` that timm writes for a vision transformer, here a small one."""

TIMM = {
    "architecture": "vit_tiny_patch16_32",
    "num_classes": 0,
    "num_features": 192,
    "pretrained_cfg": {
        "tag": "dino",
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}
