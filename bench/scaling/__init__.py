"""Many machines on paper: a simulation whose service times were measured on one."""
