#include "textflag.h"

// func cloneJob(trap, arg1, arg2, arg3 uintptr, a *spawnArea) (pid uintptr, errno uintptr)
//
// The child begins on a stack of its own. Nothing that the parent has on its stack is there.
TEXT ·cloneJob(SB),NOSPLIT,$0-56
	MOVD	trap+0(FP), R8
	MOVD	arg1+8(FP), R0
	MOVD	arg2+16(FP), R1
	MOVD	arg3+24(FP), R2
	MOVD	a+32(FP), R19
	MOVD	ZR, R3
	MOVD	ZR, R4
	MOVD	ZR, R5
	SVC
	CBZ	R0, child
	CMN	$4095, R0
	BCS	failed
	MOVD	R0, pid+40(FP)
	MOVD	ZR, errno+48(FP)
	RET
failed:
	NEG	R0, R0
	MOVD	ZR, pid+40(FP)
	MOVD	R0, errno+48(FP)
	RET
child:
	SUB	$32, RSP
	MOVD	R19, 8(RSP)
	CALL	·execJob(SB)
	BRK // execJob does not return
