/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What `entry` and the programs of the worker slots have to agree on. User space gives each object the same
 * map.
 */
#ifndef CULVERT_PLACES_H
#define CULVERT_PLACES_H

/* Worker slots that can exist at once, those of old generations included. */
#define SLOTS 1024

/* Socket -> its slot and index. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct place);
} places SEC(".maps");

#endif
