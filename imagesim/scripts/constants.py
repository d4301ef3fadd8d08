"""Where the data lies, under its old name"""
from ..infra import Layout

__all__ = ['DATA_PATH']

DATA_PATH = Layout().ard # the delivery in the data root, as the settings say where that is
