from setuptools import setup
setup(name="phd-megatron", version="0.1.0", packages=["phd_megatron"])
