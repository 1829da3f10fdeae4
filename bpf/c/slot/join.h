/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Putting a pair into the maps, by the system call bpf(2) from a program.
 */
#ifndef CULVERT_SLOT_JOIN_H
#define CULVERT_SLOT_JOIN_H

#include "../abi.h"
#include "../maps.h"
#include "tell.h"

/* The part of `union bpf_attr` that BPF_MAP_UPDATE_ELEM has. */
struct update {
	__u32 map;
	__u32 pad;
	__u64 key;
	__u64 value;
	__u64 flags;
};

static __always_inline long put(__s32 map, const void *key, const void *value)
{
	struct update update = { .map = map, .key = (unsigned long)key, .value = (unsigned long)value };

	return bpf_sys_bpf(BPF_MAP_UPDATE_ELEM, &update, sizeof(update));
}

static __always_inline long put_socket(__s32 map, __u32 index, __s32 socket)
{
	__u64 descriptor = socket;

	return put(map, &index, &descriptor);
}

static __always_inline long enter(struct join_request *request, __u32 side)
{
	__u32 index = request->index + side;
	struct flow *flow = bpf_map_lookup_elem(&flows, &index);
	struct place place = { .slot = slot_number, .index = index };
	__u64 cookie = request->cookies[side];
	__s32 socket = request->sockets[side];
	__u64 stale;
	long error;

	if (!flow)
		return -2; /* ENOENT */
	stale = flow->indexed_cookie;
	if (stale && stale != cookie)
		bpf_map_delete_elem(&indices, &stale);
	flow->indexed_cookie = cookie;
	error = bpf_map_update_elem(&indices, &cookie, &index, BPF_ANY);
	if (error)
		return error;
	return put(request->places, &socket, &place);
}

#endif
