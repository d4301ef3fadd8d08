"""`imagesim.chip` and what goes with it, under its old name"""
from ..ard import get_cog_path_from_chip

__all__ = ['get_cog_path_from_chip']
