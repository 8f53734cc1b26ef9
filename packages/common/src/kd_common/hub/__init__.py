"""Language models are loaded here from folders and the Hub, whole or not at all.

The modules need the extra ``kd-common[hub]``.
"""
