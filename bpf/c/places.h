/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The map that `entry` and the programs of all worker slots share; user space gives each object the same one. */
#ifndef CULVERT_PLACES_H
#define CULVERT_PLACES_H

/* Socket -> its slot and index. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct place);
} places SEC(".maps");

#endif
