"""Names that the users' guide imports from; the code is elsewhere. Written by hand, see CONTRIBUTING"""
