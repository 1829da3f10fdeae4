/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The maps of one worker slot. User space sizes them for 2 * worker_connections sockets, and gives
 * `totals`, `slot_totals` and `places` the ones that all slots share.
 */
#ifndef CULVERT_MAPS_H
#define CULVERT_MAPS_H

#include "places.h"

/* The sockets whose data the verdict program sees. A socket that is held back is missing here. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} sources SEC(".maps");

/*
 * The same sockets as targets of a redirect; no program is attached here. Membership keeps a socket's
 * psock, and the backlog in it, while the socket is held back as a source.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} targets SEC(".maps");

/* Socket cookie -> index of its flow. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__type(key, __u64);
	__type(value, __u32);
} indices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct flow);
} flows SEC(".maps");

/*
 * To the workers of the slot: struct event. A ring buffer has one reader, and while a configuration is
 * reloaded a slot has several workers: each takes a lane. They are no array of maps: for each entry of one the
 * kernel waits until every program that runs has ended (maybe_wait_bpf_programs, 6.12), and the master with it.
 */
struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 14);
};

struct ring lane_0 SEC(".maps"), lane_1 SEC(".maps"), lane_2 SEC(".maps"), lane_3 SEC(".maps");

/* By CPU; shared by the programs of all worker slots. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cpu_total);
} totals SEC(".maps");

/* By slot, the number of which is in `place`; shared by the programs of all worker slots. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, struct slot_total);
} slot_totals SEC(".maps");

#endif
