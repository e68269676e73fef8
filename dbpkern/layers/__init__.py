"""Layers that decorrelate their input: conversion, the layers, and the optimizer of their R."""

from dbpkern.layers.convert import decorrelate, fuse
from dbpkern.layers.modules import DecorConv2d, DecorLinear, DecorMultiheadAttention, Decorrelated
from dbpkern.layers.sgd import DecorSGD

__all__ = [
    "DecorConv2d",
    "DecorLinear",
    "DecorMultiheadAttention",
    "DecorSGD",
    "Decorrelated",
    "decorrelate",
    "fuse",
]
