"""Where tables lie beyond one copy in the devices' memory: host memory, several copies."""
