"""Bone's products: the three fused layouts, the paper's variants, and block products that may be compiled.

Imports the other operators' shared parts only; sources are in cuda/bone.
"""
