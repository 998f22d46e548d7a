"""Names that the command line takes, told before what they name is loaded."""

CAM = "cam"
MAPS = {
    CAM: "Class activation map (CAM)",
    "gradcam": "Grad-CAM, one stage before the last",
    "hirescam": "HiResCAM, one stage before the last",
    "gradient": "Size of the input gradient",
    "occlusion": "Occlusion: drop of the logit when a cell is covered",
}
OVERLAYS = ("all", "flagged", "none")
POINTS = ("spec90", "spec95", "sens90", "sens95")
CONTINUES = "the same command with --resume continues"
