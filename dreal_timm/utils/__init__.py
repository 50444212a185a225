"""What the rest of the package uses of files, terminals and devices"""
