from .dreal_resnet import *
from .reid import *
