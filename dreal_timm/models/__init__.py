from .dreal_resnet import *
