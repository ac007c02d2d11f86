"""Rotations for the scripted experts. Quaternions are w x y z, rotations 3 x 3 matrices, angles radians."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

Vector = Float[np.ndarray, "3"]
Rotation = Float[np.ndarray, "3 3"]


def pose_of(thing: Any) -> tuple[Vector, Rotation]:
    pose = thing.pose.raw_pose[0].cpu().numpy().astype(np.float64)
    return pose[:3], matrix_of(pose[3:])


def matrix_of(quaternion: Float[np.ndarray, "4"]) -> Rotation:
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_z(yaw: float) -> Rotation:
    return rotation_by(np.array([0.0, 0.0, yaw]))


def rotation_by(vector: Vector) -> Rotation:
    """Rodrigues' formula: a rotation by ``|vector|`` about its direction."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation: np.ndarray = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return rotation


def rotation_vector(rotation: Rotation) -> Vector:
    """Inverse of `rotation_by`, for angles below pi."""
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    sine, cosine = float(np.linalg.norm(axis)) / 2, (float(np.trace(rotation)) - 1) / 2
    return axis / 2 * (math.atan2(sine, cosine) / sine if sine > 1e-9 else 1.0)


def euler_xyz(rotation: Rotation) -> Vector:
    """Angles with rotation = Rx Ry Rz, the controller's convention."""
    return np.array(
        [
            math.atan2(-rotation[1, 2], rotation[2, 2]),
            math.asin(float(np.clip(rotation[0, 2], -1, 1))),
            math.atan2(-rotation[0, 1], rotation[0, 0]),
        ]
    )


def direction_of(rotation: Rotation) -> Float[np.ndarray, "2"]:
    """Direction of the x axis seen from above."""
    flat: np.ndarray = rotation[:2, 0] / (np.linalg.norm(rotation[:2, 0]) + 1e-9)
    return flat


def rotate_flat(vector: Float[np.ndarray, "2"], angle: float) -> Float[np.ndarray, "2"]:
    rotated: np.ndarray = rotation_z(angle)[:2, :2] @ vector
    return rotated
