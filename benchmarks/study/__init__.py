"""The study of docs/evidence.md: forms of the reward, trained side by side"""
