"""Simulation of many hosts, with service times measured on one."""
