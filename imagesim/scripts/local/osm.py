"""`imagesim.osm`, under its old name"""
from ...osm import fetch_osm_by_quadkey

__all__ = ['fetch_osm_by_quadkey']
