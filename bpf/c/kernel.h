/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few fields of kernel structures that the programs read. CO-RE relocates them to the running
 * kernel's layout, so neither order nor completeness matters.
 */
#ifndef CULVERT_KERNEL_H
#define CULVERT_KERNEL_H

struct sk_buff {
	char cb[48];
} __attribute__((preserve_access_index));

struct tcp_sock {
	__u32 copied_seq;
} __attribute__((preserve_access_index));

#endif
